"""The release before and this one, pulling from each other."""
