"""Trials in earnest, larger than the suite has time for. docs/reliability.md has their figures.

    .venv/bin/python -m tests.trials.checkpoints --folders 1000
    .venv/bin/python -m tests.trials.websockets --dialogues 5000
    .venv/bin/python -m tests.trials.openapi --cases 10000
    .venv/bin/python -m tests.trials.soak --minutes 30
    .venv/bin/python -m tests.trials.overload
    .venv/bin/python -m tests.trials.connections
    .venv/bin/python -m tests.trials.faults
    .venv/bin/python -m tests.trials.rolling
    .venv/bin/python -m tests.trials.replicas
    .venv/bin/python -m tests.trials.replicas --replicas 1
    .venv/bin/python -m tests.trials.churn --connections 1000
    .venv/bin/python -m tests.trials.flood

Each prints what it counted, and exits with 1 if something was not as it must be. tests/test_trials.py runs them small.
"""
