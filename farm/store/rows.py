"""Rows that come from Python, as a table of one statement: one parameter however many they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Column, Connection, FromClause, column, func, select
from sqlalchemy import cast as sql_cast
from sqlalchemy.dialects.postgresql import ARRAY


def rows(
    connection: Connection, columns: Sequence[Column[Any]], given: Sequence[Sequence[Any]]
) -> FromClause:
    """`given` as a relation with the names and types of `columns`.

    An array for each column with PostgreSQL's `unnest`; on SQLite JSON with `json_each`
    (https://www.sqlite.org/json1.html), limited so that it is not merged with what is joined to
    it: its planner would look through a whole batch for each row given.
    """
    if connection.dialect.name == "postgresql":
        arrays = [
            sql_cast(list(values), ARRAY(one.type))
            for one, values in zip(columns, zip(*given, strict=True), strict=True)
        ]
        names = [column(one.name, one.type) for one in columns]
        return func.unnest(*arrays).table_valued(*names, name="given").render_derived()
    each = func.json_each(json.dumps(given)).table_valued("value")
    parts = [
        func.json_extract(each.c.value, f"$[{i}]", type_=one.type).label(one.name)
        for i, one in enumerate(columns)
    ]
    return select(*parts).limit(-1).subquery("given")
