"""Adapters to other libraries: Hugging Face transformers, timm, open_clip."""
