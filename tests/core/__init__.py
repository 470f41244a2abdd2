"""The pure core: no I/O, no torch; properties rather than examples wherever there is a state or a format."""
