"""Drop-in use in published trainers; each submodule names the versions it is written for.

Nothing here is imported by `fused_lk` itself, and none of the trainers is needed before its integration is used.
"""
