"""Row operations on tiles of logits: the contract (`interface`), and PyTorch's answer to it (`plain`)."""
