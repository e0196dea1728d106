resource "google_firestore_database" "store" {
  count = var.create_database ? 1 : 0

  project     = var.project
  name        = var.database
  location_id = var.location
  type        = "FIRESTORE_NATIVE"

  point_in_time_recovery_enablement = (
    var.point_in_time_recovery ? "POINT_IN_TIME_RECOVERY_ENABLED" : "POINT_IN_TIME_RECOVERY_DISABLED"
  )
  delete_protection_state = (
    var.delete_protection ? "DELETE_PROTECTION_ENABLED" : "DELETE_PROTECTION_DISABLED"
  )
  deletion_policy = var.deletion_policy

  lifecycle {
    precondition {
      condition     = var.location != null
      error_message = "A database that is created needs a location."
    }
  }
}

locals {
  # The same text as var.database, known once the database is there.
  database = var.create_database ? google_firestore_database.store[0].name : var.database
}

resource "google_firestore_index" "composite" {
  for_each = local.composites

  project     = var.project
  database    = local.database
  collection  = each.value.collection
  query_scope = each.value.query_scope

  dynamic "fields" {
    for_each = each.value.fields
    content {
      field_path = fields.value.fieldPath
      order      = fields.value.order
    }
  }
}

resource "google_firestore_field" "setting" {
  for_each = local.fields

  project    = var.project
  database   = local.database
  collection = each.value.collection
  field      = each.value.field

  # Without an index inside, the block switches all automatic indexes of the field off.
  index_config {
    dynamic "indexes" {
      for_each = each.value.indexes
      content {
        order       = indexes.value.order
        query_scope = indexes.value.queryScope
      }
    }
  }

  dynamic "ttl_config" {
    for_each = each.value.ttl ? [true] : []
    content {}
  }
}

resource "google_service_account" "runtime" {
  count = var.runtime_service_account == null ? 0 : 1

  project      = var.project
  account_id   = var.runtime_service_account
  display_name = "tai-state: reads and writes the store"
}

locals {
  # Keys of for_each must be known when planning; the address of a new account is not.
  writers = merge(
    { for member in var.writers : member => member },
    { for account in google_service_account.runtime : "runtime" => "serviceAccount:${account.email}" },
  )
  condition = var.restrict_to_database ? [{
    title      = "tai-state: this database only"
    expression = "resource.name == \"projects/${var.project}/databases/${var.database}\""
  }] : []
}

# Reads and writes documents; changes no index, no database, no role.
resource "google_project_iam_member" "writer" {
  for_each = local.writers

  project = var.project
  role    = "roles/datastore.user"
  member  = each.value

  dynamic "condition" {
    for_each = local.condition
    content {
      title      = condition.value.title
      expression = condition.value.expression
    }
  }
}

# Reads documents.
resource "google_project_iam_member" "reader" {
  for_each = var.readers

  project = var.project
  role    = "roles/datastore.viewer"
  member  = each.value

  dynamic "condition" {
    for_each = local.condition
    content {
      title      = condition.value.title
      expression = condition.value.expression
    }
  }
}

# Changes indexes and TTL; reads no document. Without a condition: whether one on a database holds
# for its indexes was not verified.
resource "google_project_iam_member" "index_deployer" {
  for_each = var.index_deployers

  project = var.project
  role    = "roles/datastore.indexAdmin"
  member  = each.value
}
