"""Images by reference, where their bytes come from, and the few-shot draw."""
