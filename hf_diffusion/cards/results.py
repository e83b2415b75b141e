"""Results on a card: the same numbers in the table and in the model index that the Hub reads."""

import math
import re
from collections.abc import Sequence
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from hf_diffusion.cards.tables import cell


INDEX = "model-index"
NO_TASK = "other"
# Of the parts of a protocol one in so many may differ for it to be told by the differences.
CHANGED_AT_MOST = 3


def eval_results(
    metrics: dict[str, Any] | None, task: str | None, data_name: str, dataset: str | None = None
) -> list[EvalResult]:
    """Results of `metrics`: name -> number, or -> {"value": number, "protocol": text, ...}.

    task: the Hub's task. data_name: of the data that they were measured on. dataset: its id, where
        the Hub has it.
    """
    results = []
    for name, given in (metrics or {}).items():
        given = dict(given) if isinstance(given, dict) else {"value": given}
        value = float(given.pop("value"))
        # The protocol stands first among the details, and is left out where there is none.
        details = {
            key: detail for key, detail in {"protocol": given.pop("protocol", ""), **given}.items() if detail != ""
        }
        results.append(
            EvalResult(
                task_type=task or NO_TASK,
                dataset_type=dataset or "custom",
                dataset_name=data_name,
                metric_type=re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
                metric_name=name,
                metric_value=value,
                metric_args=details or None,
            )
        )
    return results


def model_index(title: str, results: Sequence[EvalResult]) -> dict[str, Any]:
    """The metadata of finite results: NaN is no JSON, and the Hub would refuse the whole card."""
    finite = [result for result in results if math.isfinite(result.metric_value)]
    return {INDEX: eval_results_to_model_index(title, finite)} if finite else {}


def recorded_results(metadata: dict[str, Any]) -> list[EvalResult]:
    """The results in the metadata of a card."""
    return model_index_to_eval_results(metadata[INDEX])[1] if metadata.get(INDEX) else []


def result_rows(results: Sequence[EvalResult]) -> list[str]:
    """Lines of the table of results; of a protocol like one above only the difference is said."""
    protocols = [(result.metric_args or {}).get("protocol", "") for result in results]
    rows, whole = [], ""
    for result, protocol, before in zip(results, protocols, ["", *protocols]):
        said = protocol
        if protocol and protocol == before:
            said = "as above"
        elif protocol and (changed := _changes(whole, protocol)):
            said = f"as in the last full row, but {changed}"
        else:
            whole = protocol
        rows.append(f"| {cell(result.metric_name)} | {result.metric_value:.6g} | {cell(said)} |")
    return rows


def _changes(whole: str, protocol: str) -> str:
    """What a protocol says otherwise than another of the same parts; "" where much differs."""
    former, parts = (re.split(r"[,;] ", text) for text in (whole, protocol))
    changed = [part for part, other in zip(parts, former) if part != other]
    return ", ".join(changed) if len(parts) == len(former) and len(changed) <= len(parts) // CHANGED_AT_MOST else ""
