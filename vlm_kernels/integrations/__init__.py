"""Adapters to other libraries: Hugging Face transformers, and the calls of flash-attn."""
