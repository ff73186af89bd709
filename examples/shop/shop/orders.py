"""Buying: POST /orders with {"product": ID, "quantity": N}, GET /orders/ID."""

from typing import Any

from flask import Blueprint, abort, request
from sqlalchemy import update

from .models import Order, Product, db

blueprint = Blueprint("orders", __name__, url_prefix="/orders")


@blueprint.post("")
def place() -> tuple[dict[str, Any], int]:
    product, quantity = read_order()
    # One statement that looks and takes: requests in other threads and processes buy, too.
    taken = db.session.execute(
        update(Product)
        .where(Product.id == product, Product.stock >= quantity)
        .values(stock=Product.stock - quantity)
    )
    if taken.rowcount == 0:
        abort(409, "There is not enough of it in stock.")
    order = Order(product_id=product, quantity=quantity)
    db.session.add(order)
    db.session.commit()
    return as_json(order), 201


@blueprint.get("/<int:id>")
def show(id: int) -> dict[str, Any]:
    return as_json(db.get_or_404(Order, id, description=f"There is no order {id}."))


def read_order() -> tuple[int, int]:
    try:
        wanted = request.get_json()
        product, quantity = int(wanted["product"]), int(wanted["quantity"])
    except (KeyError, TypeError, ValueError):
        abort(400, 'An order looks like {"product": 1, "quantity": 2}.')
    if quantity < 1:
        abort(400, "The quantity is at least 1.")
    return product, quantity


def as_json(order: Order) -> dict[str, Any]:
    return {
        "id": order.id,
        "product": order.product.name,
        "quantity": order.quantity,
        "total": order.quantity * order.product.price,
    }
