"""Published models from Hugging Face transformers, loaded into ours."""
