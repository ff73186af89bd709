"""Errors in JSON, as all other answers."""

from flask import Flask
from werkzeug.exceptions import HTTPException


def init_app(app: Flask) -> None:
    app.register_error_handler(HTTPException, as_json)


def as_json(error: HTTPException) -> tuple[dict[str, str | None], int]:
    return {"error": error.description}, error.code or 500
