//! Who is asking: the headers that go with every call.
//!
//! Nothing here is ever written to a log or into an error: of what Google's library says, only the
//! kind of the failure is passed on, since its texts may quote the file that holds the key.

use std::fmt;

use http::HeaderMap;
use tonic::Status;

/// Where the headers come from.
pub(super) enum Auth {
    /// The emulator's own administrator.
    Emulator,
    /// Application Default Credentials.
    #[cfg(feature = "gcp-auth")]
    Google(google::Google),
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Emulator => "Emulator",
            #[cfg(feature = "gcp-auth")]
            Self::Google(_) => "Google",
        })
    }
}

impl Auth {
    /// The headers for the next call.
    pub(super) async fn headers(&self) -> Result<HeaderMap, Status> {
        match self {
            Self::Emulator => {
                let mut headers = HeaderMap::new();
                let owner = http::HeaderValue::from_static("Bearer owner");
                headers.insert(http::header::AUTHORIZATION, owner);
                Ok(headers)
            }
            #[cfg(feature = "gcp-auth")]
            Self::Google(google) => google.headers().await,
        }
    }
}

#[cfg(feature = "gcp-auth")]
pub(super) mod google {
    //! Application Default Credentials: a key file, the account of `gcloud`, workload identity, or the
    //! metadata server.

    use std::sync::{Mutex, PoisonError};

    use google_cloud_auth::credentials::{Builder, CacheableResource, Credentials, EntityTag};
    use google_cloud_auth::errors::CredentialsError;
    use http::{Extensions, HeaderMap};
    use tonic::Status;

    const SCOPE: &str = "https://www.googleapis.com/auth/datastore";

    /// Credentials and the headers that they gave last.
    pub(in super::super) struct Google {
        credentials: Credentials,
        last: Mutex<Option<(EntityTag, HeaderMap)>>,
    }

    impl Google {
        /// Finds the credentials; asks nobody yet.
        ///
        /// # Errors
        /// Which kind of trouble the credentials' file has.
        pub(in super::super) fn find() -> Result<Self, String> {
            // The library panics without a provider of cryptography in the process. One that the
            // application has chosen stays.
            if rustls::crypto::CryptoProvider::get_default().is_none() {
                // An error says that somebody was faster, which is as good.
                let _ = rustls::crypto::ring::default_provider().install_default();
            }
            let credentials = Builder::default().with_scopes([SCOPE]).build().map_err(|error| {
                let kind = if error.is_loading() {
                    "the credentials' file cannot be read"
                } else if error.is_parsing() || error.is_missing_field() {
                    "the credentials' file is not what Google writes"
                } else if error.is_unknown_type() || error.is_not_supported() {
                    "the credentials are of a type that is not supported"
                } else {
                    "the credentials cannot be used"
                };
                format!("{kind} (GOOGLE_APPLICATION_CREDENTIALS, or the one `gcloud` wrote)")
            })?;
            Ok(Self::with(credentials))
        }

        pub(in super::super) fn with(credentials: Credentials) -> Self {
            Self { credentials, last: Mutex::new(None) }
        }

        pub(super) async fn headers(&self) -> Result<HeaderMap, Status> {
            let last = self.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let mut extensions = Extensions::new();
            if let Some((tag, _)) = &last {
                extensions.insert(tag.clone());
            }
            match (self.credentials.headers(extensions).await, last) {
                (Ok(CacheableResource::New { entity_tag, mut data }), _) => {
                    for value in data.values_mut() {
                        value.set_sensitive(true);
                    }
                    let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
                    *last = Some((entity_tag, data.clone()));
                    Ok(data)
                }
                (Ok(CacheableResource::NotModified), Some((_, headers))) => Ok(headers),
                (Ok(CacheableResource::NotModified), None) => {
                    Err(Status::unauthenticated("no credentials were given"))
                }
                (Err(error), _) => Err(refused(&error)),
            }
        }
    }

    /// Only the kind: the text may hold parts of a token's request.
    fn refused(error: &CredentialsError) -> Status {
        if error.is_transient() {
            Status::unavailable("the service that gives out credentials cannot be reached")
        } else {
            Status::unauthenticated("the credentials were not accepted")
        }
    }
}
