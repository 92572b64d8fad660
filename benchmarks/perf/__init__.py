"""The union beside other ways to have one: throughput, metadata, real programs, and what the daemon needs.

    processes     starting, timing and ending processes, also when the run is interrupted
    parts         what lies in the lower, and how much of it
    area          the place that is measured on
    contestants   who takes part, and how each mounts
    fio           the throughput jobs
    workloads     everything that is measured
    figures       samples, medians, ratios
    measuring     the turns of a run
    results       a run and its file
    report        a run as tables on the terminal
    page          a run as an HTML page, from templates/
    plots         the page's plots
    compare       what changed from one run to another
    commands      scripts/perf report and scripts/perf compare

Nothing in here asserts a time: figures depend on the machine and on who else uses it.
"""
