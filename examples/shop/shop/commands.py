"""`flask init-db`."""

import click
from flask import Flask

from .models import Product, db

PRODUCTS = [("mug", 900, 100), ("teapot", 3500, 3), ("tea", 450, 1000)]


def init_app(app: Flask) -> None:
    @app.cli.command("init-db")
    def init_db() -> None:
        """Create the tables anew, with a few products."""
        db.drop_all()
        db.create_all()
        for name, price, stock in PRODUCTS:
            db.session.add(Product(name=name, price=price, stock=stock))
        db.session.commit()
        click.echo(f"The database holds {len(PRODUCTS)} products.")
