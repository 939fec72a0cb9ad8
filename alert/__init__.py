"""ALERT (category embeddings, meta-task prompt, contrastive-reasoning reward)."""
