"""DiffuSeq: diffusion of embeddings."""
