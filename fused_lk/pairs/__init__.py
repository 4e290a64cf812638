"""Which draft row meets which target row: the pairs (`pairs`), and the patterns that trainers use (`patterns`)."""
