"""The client: one pull from one or several sources."""
