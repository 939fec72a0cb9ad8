"""Category embeddings bank (ALERT section 3.2): initialisation, drift and storage."""
