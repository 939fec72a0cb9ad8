"""The category embeddings bank (ALERT section 3.2): where it begins, how it moves, how it is stored."""
