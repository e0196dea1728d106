variable "project" {
  description = "The Google Cloud project, by its id."
  type        = string

  validation {
    condition     = !startswith(var.project, "demo-")
    error_message = "A project whose id begins with demo- is for the emulator; tai-state never connects it to Google Cloud."
  }
}

variable "database" {
  description = "The id of the Firestore database."
  type        = string
  default     = "(default)"
}

variable "prefix" {
  description = "What stands before the names of the collections: the ?prefix= of the store's URL."
  type        = string
  default     = ""

  validation {
    condition     = can(regex("^[A-Za-z0-9_-]*$", var.prefix))
    error_message = "A prefix has ASCII letters, digits, _ and -."
  }
}

variable "create_database" {
  description = "Whether to create the database. false: it exists already, in Native mode."
  type        = bool
  default     = true
}

variable "location" {
  description = "Where the database is created, such as nam5 or europe-west1. It cannot be changed afterwards."
  type        = string
  default     = null
  nullable    = true

  validation {
    condition     = var.location == null || can(regex("^[a-z0-9-]+$", var.location))
    error_message = "A location looks like nam5, eur3 or europe-west1."
  }
}

variable "point_in_time_recovery" {
  description = "Whether the versions of the last seven days stay readable. Costs storage; not retroactive."
  type        = bool
  default     = true
}

variable "delete_protection" {
  description = "Whether Google Cloud refuses to delete the database."
  type        = bool
  default     = true
}

variable "deletion_policy" {
  description = "What `terraform destroy` does with a database it created: ABANDON leaves it, DELETE deletes it."
  type        = string
  default     = "ABANDON"

  validation {
    condition     = contains(["ABANDON", "DELETE"], var.deletion_policy)
    error_message = "ABANDON or DELETE."
  }
}

variable "runtime_service_account" {
  description = "Account id of a service account to create for the services that use the store; null creates none."
  type        = string
  default     = null
  nullable    = true
}

variable "writers" {
  description = "Further members that read and write documents, such as serviceAccount:app@p.iam.gserviceaccount.com."
  type        = set(string)
  default     = []
}

variable "readers" {
  description = "Members that may only read documents, such as group:on-call@example.com."
  type        = set(string)
  default     = []
}

variable "index_deployers" {
  description = "Members that may change indexes and TTL settings, such as the account of the deployment pipeline."
  type        = set(string)
  default     = []
}

variable "restrict_to_database" {
  description = "Whether writers and readers get their role for this database only, by an IAM condition."
  type        = bool
  default     = true
}
