"""What handlers find in the application: one typed key each."""

from typing import Any

from aiohttp import web

from cableway.frontend.admission import Admission
from cableway.frontend.client import EngineClient
from cableway.frontend.metrics import Metrics
from cableway.frontend.served import ServedModel
from cableway.ipc.config import FrontendConfig

CONFIG = web.AppKey("config", FrontendConfig)
ENGINE = web.AppKey("engine", EngineClient)
MODELS = web.AppKey("models", dict[str, ServedModel])
METRICS = web.AppKey("metrics", Metrics)
ADMISSION = web.AppKey("admission", Admission)

REQUEST_ID = web.RequestKey("request_id", str)
FACTS = web.RequestKey("facts", dict[str, Any])
"""Fields for the request's log line: counts and times, never text."""
