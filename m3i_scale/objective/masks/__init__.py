"""In which order the patches of an image are hidden."""
