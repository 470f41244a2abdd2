"""The server: what it holds, whom it admits, and one session for each client."""
