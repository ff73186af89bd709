"""The API of a small shop: products and orders. Only the two lines with Replica are ours."""

from collections.abc import Mapping
from typing import Any

from flask import Flask
from shop import commands, errors, orders, products
from shop.models import db

from replica_plugin import Replica


def create_app(config: Mapping[str, Any] | None = None) -> Flask:
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite:///shop.db"  # in the folder instance/
    app.config.from_prefixed_env()
    app.config.from_mapping(config)

    db.init_app(app)
    app.register_blueprint(products.blueprint)
    app.register_blueprint(orders.blueprint)
    errors.init_app(app)
    commands.init_app(app)

    Replica(app)
    return app
