"""How long a test waits for what must end: long enough for a busy machine, and not for ever."""

PATIENCE_S = 900
