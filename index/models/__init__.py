"""The user's classifier: architectures, checkpoints, φ and head."""
