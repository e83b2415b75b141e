"""A page to try a model in a browser: the files of a Space, and how they are put together."""
