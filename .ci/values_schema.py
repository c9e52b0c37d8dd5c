"""Writes what `serving` may hold into the chart's values.schema.json, from the settings themselves.

.venv/bin/python .ci/values_schema.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from seamount.cluster.settings import Settings

PATH = Path(__file__).resolve().parents[1] / "helm" / "seamount" / "values.schema.json"
OF_THE_CHART = {
    "": {"cluster_name", "run_dir", "pools", "metrics", "autoscaling", "redis_url"},
    "draining": {"watch"},
    "redis": {"data_dir"},
    "autoscaling": {"enabled", "prefill", "decode", "routers"},
    "cache": {"disk_cache_dir"},
    "router": {
        "host",
        "api_key_file",
        "worker_token_file",
        "tls_certificate_file",
        "tls_key_file",
        "client_ca_file",
    },
}
"""Settings that the chart decides, by section: values name none of them."""


def generated(schema: dict[str, Any]) -> dict[str, Any]:
    """``schema`` with the settings' part as it should be."""
    settings = Settings.model_json_schema()
    definitions = settings["$defs"]
    serving = _section(settings, definitions, "")
    serving["properties"]["router"]["properties"]["port"]["minimum"] = 1  # a Service must know it
    properties = {**schema["properties"], "serving": serving}
    if "autoscaling" in settings["properties"]:
        targets = _section(_resolved(settings["properties"]["autoscaling"], definitions), definitions, "autoscaling")
        autoscaling = properties["autoscaling"]
        properties["autoscaling"] = {
            **autoscaling,
            "properties": {**autoscaling["properties"], "targets": targets},
        }
    return {**schema, "properties": properties}


def _section(section: dict[str, Any], definitions: dict[str, Any], name: str) -> dict[str, Any]:
    hidden = OF_THE_CHART.get(name, set())
    properties = {}
    for key, value in section["properties"].items():
        if key not in hidden:
            resolved = _resolved(value, definitions)
            properties[key] = _section(resolved, definitions, key) if "properties" in resolved else _plain(resolved)
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _resolved(value: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    for choice in [value, *value.get("anyOf", [])]:
        if "$ref" in choice:
            found: dict[str, Any] = definitions[choice["$ref"].rsplit("/", 1)[-1]]
            return found
    return value


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    return {key: kept for key, kept in value.items() if key not in ("default", "title", "format")}


def main() -> None:
    schema = json.loads(PATH.read_text(encoding="utf-8"))
    PATH.write_text(json.dumps(generated(schema), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
