"""Trained weights as others read them: a plain model, an adapter, or what to add to the base."""
