"""The method on Hugging Face transformers."""
