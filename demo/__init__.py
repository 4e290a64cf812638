"""The main job on real input: `python -m demo` trains a target, then drafts for it, and decodes with them."""
