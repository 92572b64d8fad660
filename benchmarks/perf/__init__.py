"""The union beside other merged trees: throughput, metadata, real programs, and the daemon's resources.

    processes     starting, timing and ending processes, also when the run is interrupted
    parts         the content of the lower
    area          the place of the layers
    contestants   the contestants, and how each mounts
    fio           the throughput jobs
    workloads     everything that is measured
    figures       samples, medians, ratios
    measuring     the turns of a run
    results       a run and its file
    report        a run as tables on the terminal
    page          a run as an HTML page, from templates/
    plots         the page's plots
    compare       what changed between two runs
    commands      scripts/perf report and scripts/perf compare

Nothing here asserts a time: figures depend on the machine and its other load.
"""
