"""The union beside other ways to have one: throughput, opens, metadata, and what the daemon needs.

    processes     starting, timing and ending processes, also when the run is interrupted
    area          the trees that are measured on, in memory
    contestants   who takes part, and how each mounts
    fio           the throughput jobs
    workloads     everything that is measured
    figures       samples, medians, ratios
    report        tables and JSON

Nothing in here asserts a time: figures depend on the machine and on who else uses it.
"""
