"""Drop-in use in published trainers. Each submodule names the versions that it is written for.

`fused_lk` itself imports nothing from here, and no trainer is needed before its integration is used.
"""
