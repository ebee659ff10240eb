"""Queue and history as one list of jobs, the form the page's queue panel reads. Times are milliseconds since 1970."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

PENDING, IN_PROGRESS, COMPLETED, FAILED, CANCELLED = "pending", "in_progress", "completed", "failed", "cancelled"
STATUSES = (PENDING, IN_PROGRESS, COMPLETED, FAILED, CANCELLED)
Job = dict[str, Any]

# keys of a node's ui that hold files the page can show, and extensions that tell the kind of a file
_MEDIA_KEYS = {"images": "images", "gifs": "video", "video": "video", "audio": "audio", "3d": "3d"}
_VIDEO = (".mp4", ".webm", ".mov", ".mkv", ".gif")


def _files(outputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Files shown by the nodes of a prompt, with node and kind."""
    found = []
    for node_id, ui in outputs.items():
        for key, kind in _MEDIA_KEYS.items():
            for item in ui.get(key, ()) if isinstance(ui, Mapping) else ():
                if isinstance(item, Mapping) and "filename" in item:
                    media = "video" if str(item["filename"]).lower().endswith(_VIDEO) else kind
                    found.append(
                        {
                            "filename": item["filename"],
                            "subfolder": item.get("subfolder", ""),
                            "type": item.get("type", "output"),
                            "nodeId": node_id,
                            "mediaType": media,
                        }
                    )
    return found


def _at(value: Any, *keys: str) -> Any:
    """What lies below these keys of nested mappings; None where clients sent something else."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def from_item(item: Sequence[Any], status: str) -> Job:
    """A prompt that waits or runs."""
    extra = item[3] or {}
    return {
        "id": item[1],
        "status": status,
        "create_time": extra.get("create_time", 0),
        "priority": item[0],
        "workflow_id": _at(extra, "extra_pnginfo", "workflow", "id"),
        "outputs_count": 0,
        "previewable_outputs_count": 0,
    }


def from_history(entry: Mapping[str, Any]) -> Job:
    """A prompt that has ended, from its entry in the history."""
    status = entry.get("status") or {}
    messages = dict(status.get("messages", ()))
    if "execution_interrupted" in messages:
        state = CANCELLED
    else:
        state = COMPLETED if status.get("status_str", "success") == "success" else FAILED
    job = from_item(entry["prompt"], state)
    outputs = entry.get("outputs", {})
    files = _files(outputs)
    job["outputs_count"] = sum(
        len(value)
        for ui in outputs.values()
        if isinstance(ui, Mapping)
        for value in ui.values()
        if isinstance(value, list | tuple)
    )
    job["previewable_outputs_count"] = len(files)
    if files:
        # a result rather than a passing preview
        job["preview_output"] = next((file for file in files if file["type"] == "output"), files[-1])
    start = messages.get("execution_start")
    if start:
        job["execution_start_time"] = start["timestamp"]
    ends = [
        data["timestamp"]
        for event, data in messages.items()
        if event in ("execution_success", "execution_error", "execution_interrupted") and "timestamp" in data
    ]
    if ends:
        job["execution_end_time"] = ends[-1]
    error = messages.get("execution_error")
    if error and state == FAILED:
        job["execution_error"] = {
            key: error.get(key) for key in ("node_id", "node_type", "exception_message", "exception_type", "traceback")
        }
    return job


def all_jobs(running: Sequence[Any], waiting: Sequence[Any], done: Sequence[Job]) -> list[Job]:
    """Every job: running, waiting, then done."""
    return [
        *(from_item(item, IN_PROGRESS) for item in running),
        *(from_item(item, PENDING) for item in waiting),
        *done,
    ]


def select(
    jobs: Sequence[Job],
    status: Collection[str] = (),
    workflow_id: str | None = None,
    sort_by: str = "created_at",
    sort_order: str = "desc",
) -> list[Job]:
    """Jobs with one of `status` (empty: any) and of one workflow, sorted by creation or by duration."""
    chosen = [
        job
        for job in jobs
        if (not status or job["status"] in status) and (workflow_id is None or job["workflow_id"] == workflow_id)
    ]

    def key(job: Job) -> float:
        if sort_by == "execution_duration":
            return job.get("execution_end_time", 0) - job.get("execution_start_time", 0)
        return job["create_time"]

    return sorted(chosen, key=key, reverse=sort_order != "asc")


def page(jobs: Sequence[Job], limit: int | None, offset: int) -> dict[str, Any]:
    """One page of jobs, `{jobs, pagination}`."""
    part = jobs[offset:] if limit is None else jobs[offset : offset + max(limit, 0)]
    pagination = {"offset": offset, "limit": limit, "total": len(jobs), "has_more": offset + len(part) < len(jobs)}
    return {"jobs": list(part), "pagination": pagination}


def detailed(job: Job, item: Sequence[Any], entry: Mapping[str, Any] | None = None) -> Job:
    """A job with its prompt and, where it has ended, its outputs and status."""
    entry = entry or {}
    return {
        **job,
        "workflow": {"prompt": item[2], "extra_data": item[3]},
        "outputs": entry.get("outputs", {}),
        "update_time": job.get("execution_end_time", job.get("execution_start_time", job["create_time"])),
        "execution_status": entry.get("status"),
        "execution_meta": entry.get("meta", {}),
    }
