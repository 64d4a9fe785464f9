"""Recipes that are run again and again: due times, windows, and who carries a run out.

`times` knows cron and clocks, `policy` what becomes of a due time, `runner` the processes. All that
is decided stands in SQL (farm.store.schedules), so several dispatchers and restarts do no harm.
"""
