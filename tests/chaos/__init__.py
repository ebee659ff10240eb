"""Long runs against a real server with faults in between, and a verdict.

    python -m tests.chaos --minutes 30 --ranks 3      random prompts, cancels, kills, stops, full disk, bad files
    python -m tests.chaos kills --ranks 3 --times 20  kill -9 of each rank in turn, in each phase of a prompt
    python -m tests.chaos clients --clients 100       many clients with kills and restarts in between

docs/reliability.md says how to read the result. Nothing here needs pytest.
"""
