"""Front matter of model cards: what the Hub reads out of it, and what it refuses."""

from __future__ import annotations

import re

import yaml


# Licence ids a card may carry (huggingface.co/docs/hub/repositories-licenses).
LICENSES = set(
    """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m openrail++
    bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause
    bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0
    cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
    eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research
    intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 osl-3.0
    postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    grok2-community gemma unknown other""".split()
)


SPACE_COLOURS = set("red yellow green blue indigo purple pink gray".split())


def space_errors(data: dict) -> list[str]:
    """What is wrong with a Space (huggingface.co/docs/hub/spaces-config-reference)."""
    errors = []
    if data.get("sdk") not in ("gradio", "docker", "static"):
        errors.append('"sdk" must be one of [gradio, docker, static]')
    for key in ("colorFrom", "colorTo"):
        if key in data and data[key] not in SPACE_COLOURS:
            errors.append(f'"{key}" must be one of {sorted(SPACE_COLOURS)}')
    if len(str(data.get("short_description", ""))) > 60:
        errors.append('"short_description" length must be less than or equal to 60 characters long')
    if "sdk_version" in data and not re.fullmatch(r"\d+\.\d+\.\d+", str(data["sdk_version"])):
        errors.append('"sdk_version" must be a version such as 6.0.0')
    models = data.get("models")
    if models is not None and not (isinstance(models, list) and all(isinstance(name, str) for name in models)):
        errors.append('"models" must be an array of strings')
    return errors


def read_card(text: str) -> tuple[dict, list[str], list[str]]:
    """The metadata at the head of a README.md -> (data, errors, warnings)."""
    match = re.match(r"\A\s*---[ \t]*\r?\n(.*?)(?:\r?\n)?---[ \t]*(?:\r?\n|\Z)", text, re.S)
    if not match:
        return {}, [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(match.group(1)) or {}
    except yaml.YAMLError as exc:
        return {}, [f"YAML metadata cannot be read: {exc}"], []
    if not isinstance(data, dict):
        return {}, ["YAML metadata must be a mapping"], []
    errors, warnings = [], []
    for key in ("tags", "datasets", "metrics"):
        value = data.get(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            errors.append(f'"{key}" must be an array of strings')
    licence = data.get("license")
    for name in licence if isinstance(licence, list) else [licence] if licence is not None else []:
        if name not in LICENSES:
            errors.append(f'"license" must be one of the known licence ids, not {name!r}')
    if licence == "other" and not data.get("license_name"):
        warnings.append('"license: other" should come with "license_name" and "license_link"')
    index = data.get("model-index")
    if index is not None:
        ok = isinstance(index, list) and all(isinstance(m, dict) and m.get("name") and "results" in m for m in index)
        if not ok:
            errors.append('"model-index" must be an array of {name, results}')
    return data, errors, warnings
