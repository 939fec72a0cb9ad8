"""The first stage: which categories a prompt shows, and what that costs (ALERT sections 3.1 and 3.3)."""
