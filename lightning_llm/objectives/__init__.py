"""One LightningModule per objective: fetch, call a pure loss, count."""
