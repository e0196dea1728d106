output "database" {
  description = "The id of the database."
  value       = local.database
}

output "url" {
  description = "The URL of the store, as tai-state takes it."
  value = join("", [
    "firestore://${var.project}/${local.database}",
    var.prefix == "" ? "" : "?prefix=${var.prefix}",
  ])
}

output "runtime_service_account" {
  description = "The address of the service account that was created; null if none was."
  value       = one(google_service_account.runtime[*].email)
}

output "single_field_settings" {
  description = "How many settings of single fields this module holds. A database has 200, with billing 1,000."
  value       = length(local.fields)
}
