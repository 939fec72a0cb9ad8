"""The embedded models: built from code and rendered pictures, small enough for a laptop."""
