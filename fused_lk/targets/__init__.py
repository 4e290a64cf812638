"""What a draft is scored against, one kind of target a file, and what these kinds are made from."""
