"""Fuzzing of everything that reads what others wrote.

``entries.ENTRIES`` has one function per reader: it takes any bytes and returns, or raises ``Found``: another exception
than the errors with stable codes, or a broken promise. Three things use them:

- ``test_generated.py``, in ``make test``: the same generated input every time (hypothesis, derandomized), with a bound
  on memory.
- ``atheris_run.py``, by ``make fuzz``: coverage-guided, for as long as one likes.
- ``test_regressions.py``: what was found before, one file per finding in ``regressions/<entry>/``.
"""
