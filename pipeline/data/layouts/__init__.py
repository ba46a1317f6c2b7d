"""How the files of a data set are laid out: one reader for each layout, and the listing that each returns."""
