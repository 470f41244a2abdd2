"""What a user, a peer or an operator of release 0.1 relies on, recorded and kept: see README.md in this folder.

Nothing here imports a module of netloader that is not documented, so that the inside may be laid out anew.
"""
