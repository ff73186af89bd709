"""What there is: GET /products and /products/ID."""

from typing import Any

from flask import Blueprint
from sqlalchemy import select

from .models import Product, db

blueprint = Blueprint("products", __name__, url_prefix="/products")


@blueprint.get("")
def index() -> list[dict[str, Any]]:
    return [as_json(product) for product in db.session.scalars(select(Product))]


@blueprint.get("/<int:id>")
def show(id: int) -> dict[str, Any]:
    return as_json(db.get_or_404(Product, id, description=f"There is no product {id}."))


def as_json(product: Product) -> dict[str, Any]:
    return {
        "id": product.id,
        "name": product.name,
        "price": product.price,
        "stock": product.stock,
    }
