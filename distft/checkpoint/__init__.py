"""Checkpoints: engines hand over intervals of tensors by name; this room makes them survive.

Nothing is imported here, so that `lock` can be had before torch.
"""
