"""The union beside other ways to have one: throughput, metadata, real programs, and what the daemon needs.

    processes     starting, timing and ending processes, also when the run is interrupted
    parts         what lies in the lower, and how much of it
    area          the place that is measured on
    contestants   who takes part, and how each mounts
    fio           the throughput jobs
    workloads     everything that is measured
    figures       samples, medians, ratios
    measuring     the turns of a run
    finished      a run at its end, and its JSON
    report        tables

Nothing in here asserts a time: figures depend on the machine and on who else uses it.
"""
