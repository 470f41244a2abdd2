"""Discovery: the fixed list, and what each of the three contracts promises, checked on providers in memory."""
