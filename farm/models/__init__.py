"""Weights on this machine: fetched from a hub, a URL or a mirror, locked and verified.

`fetch` brings files into a lane's `place` and `verify` checks them against the `lock`; `listing`
says which files there are, `transfer` brings their bytes, `guard` says which hosts may be asked,
`add` makes an `entry` of models.toml, with the defaults of `families`; `convert` makes a
quantised copy of a model.
"""
